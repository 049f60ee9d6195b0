"""Chains of stages, here or on a cluster: pure functions render text, the scheduler's own commands take it.

`pipeline` says what there is to do, `local` does it on this machine, `slurm` and `htcondor` write the files that make a
scheduler do it, `submit` hands them over, `status` and `why` tell what became of them. Standard library only: a login
node needs no torch. What a recipe means is not known here; the command line passes it in (`pipeline.RecipeFacts`).
"""
