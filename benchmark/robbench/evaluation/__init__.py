"""One model and one suite become one result, in this process or on many workers."""
