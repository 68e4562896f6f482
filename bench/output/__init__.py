"""What a report looks like: tables, Markdown, plots, comparisons."""
