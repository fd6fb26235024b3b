//go:build !race

package proxy

// raceSlack is added to every bound on time when the race detector slows everything down.
const raceSlack = 0
