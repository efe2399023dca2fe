"""Artefact folders: written in a temporary one, renamed when whole, marked, checked by hash, whatever they hold."""
