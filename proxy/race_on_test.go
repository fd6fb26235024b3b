//go:build race

package proxy

import "time"

// raceSlack is added to every bound on time when the race detector slows everything down.
const raceSlack = 250 * time.Millisecond
