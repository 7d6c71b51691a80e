"""The three phases in transformers' Trainer; importing it registers the entries of the Trainer's logs."""

from diffpeft.trainer import logs

logs.install()
