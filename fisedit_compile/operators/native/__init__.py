"""Code for processors that is compiled on the machine it runs on, by the C++ compiler that is found there.

Nothing needs it: where there is no compiler, PyTorch's operators compute the same.
"""
