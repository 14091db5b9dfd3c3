"""Processes without the seconds of imports."""

import multiprocessing.forkserver
import os

import pytest


@pytest.fixture(scope="module")
def server():
    """Fresh processes without the seconds of imports: real ones, forked from a server that holds the modules."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one order of summation, and no thread pool to lose in a fork
    context = multiprocessing.get_context("forkserver")
    multiprocessing.forkserver._forkserver._stop()  # one that `prepare` started in this process holds fewer modules
    context.set_forkserver_preload(["embedscale.train", "lightning", "transformers.models.gpt_neox", "peft"])
    return context
