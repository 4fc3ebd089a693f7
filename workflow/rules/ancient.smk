# What stands behind an ancient() input is looked at for reasons of its own to run. Snakemake (9.27) does not, where the job before it has to
# run: it expects to reach it from there, and over an ancient() input that exists it never does. What the change of a configuration makes
# anew would then be made by the next command alone, and this one would end as if all were done.

from collections import defaultdict
from snakemake.dag import DAG


class LookingBehindAncient:
    """While a DAG finds out what has to run, its search from a job downwards takes no way that is ancient() alone."""

    def __init__(self, dag):
        self.dag = dag

    def __call__(self, direction, *jobs, **options):
        followed = defaultdict(dict)
        for job, dependents in direction.items():
            followed[job] = {other: files for other, files in dependents.items() if not all(file.is_ancient for file in files)}
        return DAG.bfs(self.dag, followed, *jobs, **options)


if not hasattr(DAG, "update_needrun_of_snakemake"):  # a Snakefile can be read several times in a process
    DAG.update_needrun_of_snakemake = DAG.update_needrun

    async def update_needrun(dag, *arguments, **options):
        dag.bfs = LookingBehindAncient(dag)
        try:
            await dag.update_needrun_of_snakemake(*arguments, **options)
        finally:
            del dag.bfs

    DAG.update_needrun = update_needrun
