package load

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Sequence is what one operation does.
type Sequence string

// The sequences.
const (
	// Document asks for the credentials alone, as an SDK that knows its role and has a session token.
	Document Sequence = "document"
	// Full is all that an SDK does which has just started: session token (with version 2), role list, document.
	Full Sequence = "full"
)

// Reuse says how long a connection serves.
type Reuse string

// The ways to use connections.
const (
	Keep        Reuse = "keep"     // for one operation after the other
	PerSequence Reuse = "sequence" // for one operation
	PerRequest  Reuse = "request"  // for one request of an operation
)

// Options say what to ask, how, and how often.
type Options struct {
	Endpoint    netip.AddrPort // zero: 169.254.169.254:80
	Sequence    Sequence       // empty: Full
	Version     int            // of IMDS, 1 or 2; 0: 2
	Reuse       Reuse          // empty: PerSequence
	Connections int            // open at most; 0: 16. Operations that find none free wait, which counts
	Rate        float64        // operations a second
	Duration    time.Duration  // in which operations begin
	Warmup      time.Duration  // of the same load before, which is not counted
	Timeout     time.Duration  // of one operation from when it has its connection; 0: 5 s
	Role        string         // for Document; empty: the role list's first line
	// Want is the status of the last answer of a good operation; 0: 200. An operation ends with the first other answer.
	Want int
}

// Bounds that keep a mistake from becoming an attack.
const (
	maxConnections = 1024
	maxRate        = 100_000
	maxDuration    = 24 * time.Hour
)

// Validate says what makes no sense.
func (o Options) Validate() error {
	_, err := o.complete()
	return err
}

// complete fills in the defaults and refuses what makes no sense.
func (o Options) complete() (Options, error) {
	if !o.Endpoint.IsValid() {
		o.Endpoint = netip.MustParseAddrPort("169.254.169.254:80")
	}
	if o.Sequence == "" {
		o.Sequence = Full
	}
	if o.Version == 0 {
		o.Version = 2
	}
	if o.Reuse == "" {
		o.Reuse = PerSequence
	}
	if o.Connections == 0 {
		o.Connections = 16
	}
	if o.Timeout == 0 {
		o.Timeout = 5 * time.Second
	}
	if o.Want == 0 {
		o.Want = 200
	}
	var errs []error
	refuse := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	refuse(o.Sequence != Document && o.Sequence != Full, "sequence %q: want %s or %s", o.Sequence, Document, Full)
	refuse(o.Version != 1 && o.Version != 2, "version %d: want 1 or 2", o.Version)
	refuse(o.Reuse != Keep && o.Reuse != PerSequence && o.Reuse != PerRequest, "reuse %q: want %s, %s or %s", o.Reuse, Keep, PerSequence, PerRequest)
	refuse(o.Connections < 1 || o.Connections > maxConnections, "%d connections: want 1 to %d", o.Connections, maxConnections)
	refuse(!(o.Rate > 0 && o.Rate <= maxRate), "rate %v: want more than 0 and at most %d a second", o.Rate, maxRate)
	refuse(o.Duration <= 0 || o.Duration > maxDuration, "duration %v: want more than 0 and at most %v", o.Duration, maxDuration)
	refuse(o.Warmup < 0 || o.Warmup > maxDuration, "warm-up %v: want 0 to %v", o.Warmup, maxDuration)
	refuse(o.Timeout < time.Millisecond, "timeout %v: want at least 1ms", o.Timeout)
	refuse(o.Want < 100 || o.Want > 599, "status %d: want 100 to 599", o.Want)
	refuse(strings.ContainsFunc(o.Role, func(r rune) bool { return r <= ' ' || r > '~' }), "role %q: cannot be in a path", o.Role)
	return o, errors.Join(errs...)
}
