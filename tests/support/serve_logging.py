"""Serve ``app:app`` with poolkeeper's log among uvicorn's own, on the port that is given."""

import sys

import uvicorn
from uvicorn.config import LOGGING_CONFIG

LOGGING_CONFIG["loggers"]["poolkeeper"] = {"handlers": ["default"], "level": "INFO"}
uvicorn.run("app:app", port=int(sys.argv[1]), log_config=LOGGING_CONFIG)
