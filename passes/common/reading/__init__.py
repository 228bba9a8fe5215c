"""What the arguments of an operator say, alike for all its overloads; for all stages."""
