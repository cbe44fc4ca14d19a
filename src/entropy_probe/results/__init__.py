"""What probes return and files hold: plain, validated, versioned data. Nothing here needs torch."""
