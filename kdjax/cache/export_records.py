"""Exports a cache to JSON lines as NeMo-Aligner writes them."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""


def run(arguments: argparse.Namespace) -> None:
    """Writes the files."""
