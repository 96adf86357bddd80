"""A report as a page for people or as JUnit XML for machines. Pure: a report in, text out; cli.py writes it."""
