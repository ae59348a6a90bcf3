"""Starting a run where it is to run: Slurm scripts, Kubernetes manifests, and what they call.

`python -m launch slurm|kuberay` renders; `launch.preflight` looks at every node of a job before
anything is loaded; `launch.start` begins the run, or goes on with it after a requeue.
"""
