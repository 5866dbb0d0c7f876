"""What is shown of plans and of how a network scales: tables of 79 columns, records, plots."""
