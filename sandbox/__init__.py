"""An isolated, stateful Python interpreter for code that a model wrote.

Standard library only; knows nothing of the trainer around it. This module imports nothing, since
the spawner process loads the package with a bare interpreter: take `Sandbox` from
`sandbox.supervisor`, the data from `sandbox.results`, the limits from `sandbox.limits`.
"""
