"""Tool calls and reasoning: the formats that models write in, and how answers are read."""
