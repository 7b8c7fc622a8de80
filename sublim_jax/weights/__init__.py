"""Parameters in and out of the formats that people use. Only formats that can run no code."""
