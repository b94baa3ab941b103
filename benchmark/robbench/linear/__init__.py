"""The linear model of robustness (Shafahi et al. 2019, Eq. 2-4): how it is measured, stored and read."""
