"""From saved tables to figures, the ledger of claims, the report and the README; no model is loaded here."""
