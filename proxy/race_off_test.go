//go:build !race

package proxy

import "time"

// slack is added to every bound on time: the tests share their machine.
const slack = 150 * time.Millisecond

const raceEnabled = false
