"""`d2zero benchmark`: latency by stage, throughput, memory, equality and accuracy of models, side by side.

`plan` says what to measure, `session` opens a `worker` process per candidate, `measure` runs them in `rounds`, `report`
keeps the samples, `tables` and `page` show them, `gates` refuse. Studies of one question are scripts beside the
package (`benchmarks/studies`, `benchmarks/gpu`).
"""
