"""Passes of the lean decoder on the CPU, in C++."""
