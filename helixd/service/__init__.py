"""What a service manager is told and asks for: readiness, status, the watchdog. Knows no room of the daemon."""
