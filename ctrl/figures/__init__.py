"""The figures of the results; each function draws one from tables and arrays and writes it as a PNG."""
