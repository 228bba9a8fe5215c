"""A program made callable: its inputs, its lowering, its replay, and what is kept between calls."""
