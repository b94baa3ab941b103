"""The linear model of robustness (Shafahi et al. 2019, Eq. 2-4): its measurement, its files and its theory."""
