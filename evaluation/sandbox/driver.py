"""Inside the sandbox: runs the program text, or calls one function of it and hands its value out as JSON.

Whatever the program does to this process, it can at most give a wrong value: the expected ones are not here.
"""

import json
import os
import sys
import types

# What solutions to contest problems take for granted (LiveCodeBench runs them under the same imports).
PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json
"""


def main() -> None:
    """``argv[1]`` is the folder with main.py and task.json."""
    folder = sys.argv[1]
    with open(f"{folder}/main.py", encoding="utf-8", errors="surrogatepass") as f:
        source = f.read()
    with open(f"{folder}/task.json", encoding="utf-8") as f:
        task = json.load(f)
    write, dump, close = os.write, json.dumps, os._exit
    sys.argv = ["main.py"]
    sys.setrecursionlimit(50_000)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(PRELUDE, module.__dict__)
    exec(compile(source, "main.py", "exec"), module.__dict__)
    if task:
        owner = module.Solution() if "Solution" in module.__dict__ else module
        value = getattr(owner, task["function"])(*task["arguments"])
        data = dump(value).encode()
        while data:
            data = data[write(3, data) :]
        close(0)


if __name__ == "__main__":
    main()
