"""A batch job on a Ray cluster: reads Parquet, answers the column `prompt` of each row, and writes Parquet.

    pip install '.[ray]'
    python docs/ray_batch.py QUESTIONS.parquet ANSWERS --actors 4

Each actor loads the model once. One that dies is started again by Ray, which then does its unfinished blocks anew: a
row's answer depends on the row alone, so the output is the same. A block is what an actor takes at a time, and all of
an input file unless it is divided: hence `repartition`. On machines with accelerators say how many an actor takes:
--num-gpus 1, or --resource TPU=4.
"""

import argparse

import ray

from jaxinfer.batch.ray import Predictor
from jaxinfer.demo import MODEL_DIR

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("input", help="files or a folder, local, gs:// or s3://")
parser.add_argument("output", help="a new folder")
parser.add_argument("--model", default=str(MODEL_DIR), help="folder or hub id, the same on all machines")
parser.add_argument("--actors", type=int, default=1)
parser.add_argument("--rows", type=int, default=1024, help="of a block: they run together, and are done anew together")
parser.add_argument("--num-gpus", type=float, default=0)
parser.add_argument("--resource", metavar="NAME=N", help="what else an actor takes")
arguments = parser.parse_args()
name, _, count = (arguments.resource or "").partition("=")

questions = ray.data.read_parquet(arguments.input)
answers = questions.repartition(target_num_rows_per_block=arguments.rows).map_batches(
    Predictor,
    fn_constructor_kwargs={
        "model": arguments.model,
        "task": "generate",
        "sampling_params": {"max_tokens": 64},
        "id_column": "id",
    },
    batch_format="pyarrow",
    batch_size=None,  # a block
    concurrency=arguments.actors,
    num_gpus=arguments.num_gpus,
    resources={name: float(count)} if name else None,
)
answers.write_parquet(arguments.output)
