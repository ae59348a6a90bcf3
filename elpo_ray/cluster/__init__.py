"""The only Ray: which actors there are, where they live, and how the driver speaks to them.

An actor is a plain class with what Ray adds: `SandboxActor` is a sandbox host, `LearnerActor` holds
a rank and the publisher of its weights, `RolloutActor` an engine and the trees beside it. The
driver sees two groups with ordinary blocking methods (`LearnerGroup`, `RolloutGroup`). Every wait
has a deadline (`cluster.call_timeout_s`) whose miss names the actor and the phase (`waits`).
"""
