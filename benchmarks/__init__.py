"""Measures fastrnn against its peers: ``python -m benchmarks --help``.

A run (`suites`) checks that every contender (`peers`, `variants`) computes the same thing from the same weights, times
them in rotating blocks (`timing`) or takes their peak memory (`memory`), relates the times to what this machine can do
at all (`limits`), and writes one CSV row per contender (`records`). Tables, plots and verdicts come from these rows
(`table`, `report`, `targets`), never from anything else.
"""
