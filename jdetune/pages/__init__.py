"""Pages for people, made from a report: ``report.html`` and the model cards."""
