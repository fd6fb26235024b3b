package cache

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

const (
	// margin is how long before they expire credentials are no longer served: a client that has just got them needs time
	// to use them.
	margin = 60 * time.Second
	// The back-off after an error begins with minBackOff and doubles up to maxBackOff.
	minBackOff = time.Second
	maxBackOff = time.Minute
	// jitter spreads refreshes and back-offs by ±10 %, so that keys that were issued together part. At the shortest
	// session of 45 min the latest refresh (half life + 10 %) still leaves more than 20 min.
	jitter = 0.1
)

// value is one answer of the issuer. It is immutable.
type value struct {
	creds Credentials
	// Ends of serving and beginning of the refresh by either clock; the earlier counts (invariant 8). The fields on the left
	// carry a monotonic reading, those on the right do not, which makes time.Time compare by the clock that is meant.
	serveUntil, serveUntilWall time.Time
	refreshAt, refreshAtWall   time.Time
}

// newValue is what the credentials of a session of the given duration are worth now, at the given age: none when they have just
// arrived, else those of an earlier run, whose refresh and end are no later for that.
func newValue(creds Credentials, duration, age time.Duration, now time.Time, encode func(Credentials) []byte) (*value, error) {
	if creds.secret == nil || creds.AccessKeyID == "" {
		return nil, errNothing
	}
	left := creds.Expires.Round(0).Sub(now.Round(0))
	if duration > 0 {
		// With a clock that is behind, the wall clock would keep them too long. Their duration bounds that.
		left = min(left, duration-age)
	}
	if left <= margin {
		return nil, &IssueError{
			Err: fmt.Errorf("the credentials expire at %s, %s from now by this node's clock",
				creds.Expires.UTC().Format(time.RFC3339), left.Round(time.Second)),
			Hint: "set the node's clock",
		}
	}
	if creds.Issued.IsZero() {
		creds.Issued = now
	}
	if creds.Expires.Sub(now.Round(0)) > maxSession { // no clock is that wrong; a client would keep them for ever
		creds.Expires = now.Round(0).Add(left)
	}
	if encode != nil {
		creds = creds.withDocument(encode(creds))
	}
	life := left + age
	refresh := min(jittered(life/2, spread(creds.AccessKeyID)), life-margin) - age // with little left the end of serving comes before half life
	return &value{
		creds:          creds,
		serveUntil:     now.Add(left - margin),
		serveUntilWall: creds.Expires.Round(0).Add(-margin),
		refreshAt:      now.Add(refresh),
		refreshAtWall:  now.Round(0).Add(refresh),
	}, nil
}

// spread is a number in [0, 1) that a session always has: after a restart, and in both instances during an update, it is
// refreshed when it would have been.
func spread(accessKeyID string) float64 {
	sum := sha256.Sum256([]byte(accessKeyID))
	return float64(binary.BigEndian.Uint64(sum[:])>>11) / (1 << 53)
}

func (v *value) servable(now time.Time) bool {
	return now.Before(v.serveUntil) && now.Before(v.serveUntilWall)
}

// entry is the state of one key. The cache's lock guards it.
type entry struct {
	key          Key
	value        *value // nil before the first success; never overwritten by a failure
	evicted      bool   // another may have its key now
	live         bool   // a live pod is authorized for it
	prefetch     bool   // and it is to be issued without being asked for
	asked        bool   // a request has asked for it
	waiters      int
	waitingSince time.Time // of the first of the waiters
	issuing      bool
	background   bool          // no request waited when the issue began
	greedy       bool          // its namespace has had more than its share of issues
	changed      chan struct{} // closed and replaced when an issue ends
	err          error         // of the last try, nil after success
	failures     int           // in a row
	retryAt      time.Time
}

func (e *entry) servable(now time.Time) bool { return e.value != nil && e.value.servable(now) }

func (e *entry) state(now time.Time) State {
	switch {
	case e.servable(now):
		return Ready
	case e.err != nil:
		return Failed
	}
	return Pending
}

// dueAt is when the next issue should begin, if it is wanted at all.
func (e *entry) dueAt(now time.Time) time.Time {
	at := now
	if v := e.value; v != nil && now.Before(v.refreshAt) && now.Before(v.refreshAtWall) {
		at = v.refreshAt
	}
	if e.retryAt.After(at) {
		at = e.retryAt
	}
	return at
}

// hopeless says that the next try will not begin before ctx's deadline.
func (e *entry) hopeless(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ok && e.retryAt.After(deadline)
}

// unavailable is Get's error.
func (e *entry) unavailable() error {
	if e.err == nil {
		return ErrUnavailable
	}
	if denied, ok := errors.AsType[*IssueError](e.err); ok && denied.Denied {
		return denied
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, e.err)
}

// byUrgency orders keys that are due: those that a request waits for, the longest waiting first; then by expiry, those
// first that were asked for and have expired or never come; last what nobody has asked for yet. Those of greedy namespaces follow,
// in the same order.
func byUrgency(a, b *entry) int {
	if ra, rb := a.rank(), b.rank(); ra != rb {
		return ra - rb
	}
	if a.waiters > 0 {
		return a.waitingSince.Compare(b.waitingSince)
	}
	return a.expiry().Compare(b.expiry())
}

func (e *entry) rank() int {
	const ranks = 3
	rank := 2
	switch {
	case e.waiters > 0:
		rank = 0
	case e.value != nil || e.asked:
		rank = 1
	}
	if e.greedy {
		rank += ranks
	}
	return rank
}

func (e *entry) expiry() time.Time {
	if e.value == nil {
		return time.Time{}
	}
	return e.value.serveUntil
}

// backOff is how long to wait after a failure that so many others came before. random is in [0, 1).
func backOff(before int, random float64) time.Duration {
	d := maxBackOff
	if before < 6 { // 2⁶ s would pass the maximum
		d = minBackOff << before
	}
	return jittered(d, random)
}

// jittered is d, made up to 10 % shorter or longer by a random number in [0, 1).
func jittered(d time.Duration, random float64) time.Duration {
	return time.Duration(float64(d) * (1 - jitter + 2*jitter*random))
}
