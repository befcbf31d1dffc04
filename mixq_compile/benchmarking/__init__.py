"""What `mixq bench` measures: one file for each benchmark, all with their baselines in the same run.

`timing` times interleaved calls, `baselines` holds the peers, `planted` makes weights and activations
with outlier columns, and `results` turns what was measured into JSON, Markdown and plots.
"""
