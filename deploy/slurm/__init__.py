"""A run on a Slurm cluster: one job for the controller, one for each replica, which come and go one by one.

    orrery up --> sbatch --> controller's job: supervisor (`supervise`) + controller
                                   |  sbatch, scancel, squeue: once a second what the controller wants
                                   +--> replica's job --> srun --> services.policy, ...

A person's shell may end: the supervisor runs in the controller's job, and whoever started the run only watches. When
the job's node is lost, Slurm requeues the job, a new supervisor claims the run (`services/controller/launch.py`), its
controller replays the journal, and the replicas' jobs, which know the controller by `controller.address` alone, are
taken over as they are.
"""
