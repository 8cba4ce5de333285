"""Benchmarks: latency by stage, throughput, memory, equality and accuracy of models, side by side.

`d2zero benchmark` measures, `report` keeps, `table` and `html` show, `gates` refuse. What is measured are
`Segmenter`s: a checkpoint's, an exported model's, or a variant's (`variants`); peers run their network alone.
"""
