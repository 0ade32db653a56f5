"""`roadmill store WORD`: what people type about the scene store."""

from __future__ import annotations

import typer

store_app = typer.Typer(name="store", no_args_is_help=True, help="Look after the scene store.")
