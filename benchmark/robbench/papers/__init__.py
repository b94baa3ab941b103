"""Tables and figures that compare our results with the papers'."""
