"""Reads finished runs and sweep jobs and finds what differs between them. Renders nothing."""
