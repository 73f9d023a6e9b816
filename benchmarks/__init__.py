"""Measures fastrnn against its peers: ``python -m benchmarks --help``.

A run checks that every contender computes the same thing from the same weights, times them in rotating blocks
(`timing`), relates the times to what this machine can do at all (`limits`), and writes one CSV row per contender
(`records`). Tables and plots are drawn from these rows (`table`, `report`), never from anything else.
"""
