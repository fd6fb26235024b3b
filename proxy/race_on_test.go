//go:build race

package proxy

import "time"

// slack is added to every bound on time: the tests share their machine, and the race detector slows everything down.
const slack = 500 * time.Millisecond

const raceEnabled = true
