package sts

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"golang.org/x/sync/singleflight"
)

const (
	intermediateTimeout = 9 * time.Second  // of one refresh, which serves all callers and so has its own context
	intermediateRetry   = 30 * time.Second // pause after a failed refresh, while the old session is still valid
	intermediateMargin  = time.Minute      // a session that ends sooner signs nothing any more
)

// intermediate holds the session of the intermediate role. It is refreshed from half of its life on, and until it ends
// nobody waits for that. The SDK's own credentials cache would fail with every failed refresh and has no half life.
type intermediate struct {
	role   string // its ARN
	assume func(context.Context) (aws.Credentials, error)
	log    *slog.Logger

	flight singleflight.Group

	mu        sync.Mutex
	current   aws.Credentials
	refreshAt time.Time
}

// Retrieve returns a session that is valid for a minute at least.
func (i *intermediate) Retrieve(ctx context.Context) (aws.Credentials, error) {
	current, due := i.peek()
	if current.HasKeys() && !due {
		return current, nil
	}
	refreshed := i.flight.DoChan("", func() (any, error) { return i.refresh(ctx) })
	if current.HasKeys() {
		return current, nil
	}
	select {
	case r := <-refreshed:
		if r.Err != nil {
			return aws.Credentials{}, r.Err
		}
		return r.Val.(aws.Credentials), nil
	case <-ctx.Done():
		return aws.Credentials{}, ctx.Err()
	}
}

// Invalidate forgets the session: STS refused it.
func (i *intermediate) Invalidate() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.current = aws.Credentials{}
}

// peek returns the session, or none when it ends too soon, and whether a refresh is due.
func (i *intermediate) peek() (current aws.Credentials, due bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	if !now.Add(intermediateMargin).Before(i.current.Expires) {
		return aws.Credentials{}, true
	}
	return i.current, !now.Before(i.refreshAt)
}

// refresh is not cancelled by the caller that happened to start it.
func (i *intermediate) refresh(ctx context.Context) (aws.Credentials, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), intermediateTimeout)
	defer cancel()
	if current, due := i.peek(); !due { // another flight landed since the caller looked
		return current, nil
	}
	next, err := i.assume(ctx)

	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	if err != nil {
		i.refreshAt = now.Add(intermediateRetry)
		i.log.Warn("cannot assume the intermediate role", "error", err, "valid_until", i.current.Expires)
		return aws.Credentials{}, err
	}
	i.current, i.refreshAt = next, now.Add(next.Expires.Sub(now)/2)
	return next, nil
}
