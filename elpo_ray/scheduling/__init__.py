"""How inputs come to rollout workers and their trees come back: pulled, streamed, never lost.

A worker says how much room it has and gets as many inputs (`runner`); whatever completes goes to
the driver at once (`jobs`); the queue knows which worker holds what, and hands the inputs of
a dead worker out again from where they were (`queue`, `batches`). `shared_budget` divides a step's
rollouts, `dynamic_sampling` chooses its inputs, `pipeline` says when it grows. Nothing here uses
Ray: `cluster` carries the messages.
"""
