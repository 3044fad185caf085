"""Models to run and to copy; the function `build(data, prior)` of each file returns a program."""
