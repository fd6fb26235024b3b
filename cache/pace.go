package cache

import (
	"maps"
	"math"
	"time"

	"golang.org/x/time/rate"
)

const (
	recovery = time.Minute // in which a pace that throttling has slowed doubles
	slowest  = 100         // a pace is never slowed to less than this part of the full one
)

// pace bounds the issue calls of the node. An issuer that throttles serves an account's other nodes as well: then each of them
// asks at half its pace, again and again until there is enough for all, and carefully faster later. Pods that wait go first at
// any pace, so they need not wait for what every other node only fetches ahead. The cache's lock guards it.
type pace struct {
	bucket *rate.Limiter
	full   rate.Limit
	slowed rate.Limit // at the last throttling; 0: the pace is the full one
	at     time.Time  // of it
}

func newPace(limit float64) pace {
	return pace{bucket: rate.NewLimiter(rate.Limit(limit), int(math.Ceil(limit))), full: rate.Limit(limit)}
}

// throttled halves the pace. Calls that were under way together count as one.
func (p *pace) throttled(now time.Time) {
	if p.slowed > 0 && now.Sub(p.at) < time.Second {
		return
	}
	p.slowed, p.at = max(p.limit(now)/2, p.full/slowest), now
	p.bucket.SetLimitAt(now, p.slowed)
	if tokens := int(p.bucket.TokensAt(now)); tokens > 0 {
		p.bucket.AllowN(now, tokens) // they were saved at the pace that was too fast
	}
}

func (p *pace) limit(now time.Time) rate.Limit {
	if p.slowed == 0 {
		return p.full
	}
	return min(p.full, p.slowed*rate.Limit(math.Exp2(float64(now.Sub(p.at))/float64(recovery))))
}

// adjust makes the bucket follow the recovery.
func (p *pace) adjust(now time.Time) {
	if p.slowed == 0 {
		return
	}
	limit := p.limit(now)
	p.bucket.SetLimitAt(now, limit)
	if limit == p.full {
		p.slowed = 0
	}
}

// shares tell who has had more than a share of the issue calls lately: the calls of a greedy namespace are for when nobody else needs
// one. Its owner can make new keys as fast as it changes annotations. A share is a tenth of the full pace, with as much in hand as
// the node has. The cache's lock guards it.
type shares struct {
	limit      rate.Limit
	burst      int
	namespaces map[string]*rate.Limiter
}

func newShares(limit float64) shares {
	return shares{limit: rate.Limit(limit / 10), burst: int(math.Ceil(limit)), namespaces: make(map[string]*rate.Limiter)}
}

func (s *shares) greedy(namespace string, now time.Time) bool {
	l := s.namespaces[namespace]
	return l != nil && l.TokensAt(now) < 1
}

func (s *shares) spend(namespace string, now time.Time) {
	l := s.namespaces[namespace]
	if l == nil {
		l = rate.NewLimiter(s.limit, s.burst)
		s.namespaces[namespace] = l
	}
	l.AllowN(now, 1)
}

// forget drops those that have their whole share again.
func (s *shares) forget(now time.Time) {
	maps.DeleteFunc(s.namespaces, func(_ string, l *rate.Limiter) bool { return l.TokensAt(now) >= float64(s.burst) })
}
