// Package monitoring proves what operators look at: a real Prometheus scrapes a real daemon, every query of the dashboard and
// of the alerts finds its data there, and each alert comes true in its fault, not before.
//
// The alerts' times (for, and the windows that need hours) are promtool's to test: alerts_test.yaml. Not provoked here is a missing
// guard: the daemon restores it within milliseconds of its loss.
package monitoring
