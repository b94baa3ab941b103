"""The vocabulary of every room: types, errors, exact numbers, files, random numbers, threat geometry, losses."""
