"""Code that every other folder uses: types, errors, exact numbers, files, random numbers, threat geometry, losses."""
