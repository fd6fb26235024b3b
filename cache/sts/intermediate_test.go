package sts

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/google/go-cmp/cmp"
)

func TestIntermediate(t *testing.T) {
	s, srv := start(t, Options{IntermediateRoleARN: hopARN, NodeSessionName: "imdsgate@" + strings.Repeat("n", 80)}, nil)
	for range 2 {
		if _, err := s.Issue(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	type seen struct{ Role, Session, Duration, SignedBy, Token string }
	var got []seen
	for _, c := range srv.seen() {
		got = append(got, seen{c.form.Get("RoleArn"), c.form.Get("RoleSessionName"), c.form.Get("DurationSeconds"), c.signedBy(), c.sessionToken})
	}
	pod := seen{role, "shop.cart@node-1", "3600", "ASIA1", issuedSession}
	if diff := cmp.Diff([]seen{
		{hopARN, "imdsgate@" + strings.Repeat("n", 55), "3600", "AKIANODE", ""}, pod, pod,
	}, got); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

func TestIntermediateRefused(t *testing.T) {
	s, srv := start(t, Options{IntermediateRoleARN: hopARN}, refuse(403, "AccessDenied", "no"))
	_, err := s.Issue(t.Context(), key)
	e := issueError(t, err)
	if e.Code != "AccessDenied" || !e.Denied || !strings.HasPrefix(e.Error(), "intermediate role: AssumeRole "+hopARN+": AccessDenied: no") || !strings.Contains(e.Hint, "the policy of the node's role") {
		t.Errorf("error %+v", e)
	}
	if n := len(srv.seen()); n != 1 {
		t.Errorf("%d calls, want 1: the pod's role must not be tried", n)
	}
}

// A session of the intermediate role that STS refuses is replaced.
func TestIntermediateSessionRefused(t *testing.T) {
	s, srv := start(t, Options{IntermediateRoleARN: hopARN}, func(n int, _ call) answer {
		if n == 2 {
			return answer{status: 403, code: "ExpiredToken"}
		}
		return answer{}
	})
	if _, err := s.Issue(t.Context(), key); err == nil {
		t.Fatal("no error")
	}
	if _, err := s.Issue(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	calls := srv.seen()
	if len(calls) != 4 || calls[2].form.Get("RoleArn") != hopARN || calls[3].signedBy() != "ASIA3" {
		t.Errorf("%d calls, last signed by %s; want the intermediate role assumed again", len(calls), calls[len(calls)-1].signedBy())
	}
}

// scripted is an intermediate whose role is assumed by a function of the number of the attempt.
func scripted(f func(ctx context.Context, n int64) (aws.Credentials, error)) (*intermediate, *atomic.Int64) {
	n := new(atomic.Int64)
	return &intermediate{log: slog.New(slog.DiscardHandler), assume: func(ctx context.Context) (aws.Credentials, error) {
		return f(ctx, n.Add(1))
	}}, n
}

func hour(id string) aws.Credentials {
	return aws.Credentials{AccessKeyID: id, SecretAccessKey: "s", SessionToken: "t", CanExpire: true, Expires: time.Now().Add(time.Hour)}
}

func TestIntermediateIsRefreshedFromHalfLifeOnAndNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, n := scripted(func(_ context.Context, n int64) (aws.Credentials, error) {
			time.Sleep(time.Second)
			return hour([]string{"", "first", "second"}[n]), nil
		})
		want := func(id string, calls int64) {
			t.Helper()
			begin := time.Now()
			c, err := i.Retrieve(t.Context())
			waited := time.Since(begin)
			synctest.Wait()
			if err != nil || c.AccessKeyID != id || n.Load() != calls {
				t.Fatalf("%s (%v) after %d calls, want %s after %d", c.AccessKeyID, err, n.Load(), id, calls)
			}
			if calls > 1 && waited != 0 {
				t.Fatalf("waited %v", waited)
			}
		}
		want("first", 1)
		time.Sleep(29 * time.Minute)
		want("first", 1)
		time.Sleep(2 * time.Minute)
		want("first", 2) // refreshed behind the caller's back
		time.Sleep(2 * time.Second)
		want("second", 2)
	})
}

func TestIntermediateSurvivesFailedRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := errors.New("down")
		i, n := scripted(func(_ context.Context, n int64) (aws.Credentials, error) {
			if n > 1 {
				return aws.Credentials{}, down
			}
			return hour("first"), nil
		})
		ask := func() error {
			_, err := i.Retrieve(t.Context())
			synctest.Wait()
			return err
		}
		if err := ask(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		for range 100 {
			if err := ask(); err != nil {
				t.Fatal(err)
			}
		}
		if n.Load() != 2 {
			t.Errorf("%d calls, want one refresh in %v", n.Load(), intermediateRetry)
		}
		time.Sleep(intermediateRetry)
		if err := ask(); err != nil || n.Load() != 3 {
			t.Errorf("%d calls and %v, want another refresh after %v", n.Load(), err, intermediateRetry)
		}
		time.Sleep(29 * time.Minute) // 30 s before its end
		if err := ask(); !errors.Is(err, down) {
			t.Errorf("error %v after the session's end, want the refresh's", err)
		}
	})
}

func TestIntermediateIsAssumedOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, n := scripted(func(ctx context.Context, _ int64) (aws.Credentials, error) {
			time.Sleep(time.Second)
			return hour("first"), ctx.Err()
		})
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := i.Retrieve(impatient); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want the caller's deadline", err)
		}
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if _, err := i.Retrieve(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if n.Load() != 1 {
			t.Errorf("%d calls, want 1", n.Load())
		}
	})
}

func TestIntermediateRefreshEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, _ := scripted(func(ctx context.Context, _ int64) (aws.Credentials, error) {
			<-ctx.Done()
			return aws.Credentials{}, ctx.Err()
		})
		begin := time.Now()
		if _, err := i.Retrieve(t.Context()); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != intermediateTimeout {
			t.Errorf("error %v after %v, want one after %v", err, time.Since(begin), intermediateTimeout)
		}
	})
}

// A caller that looked just before a refresh landed starts another one: it must not cost a call.
func TestIntermediateIsNotRefreshedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, n := scripted(func(context.Context, int64) (aws.Credentials, error) { return hour("first"), nil })
		for range 2 {
			if c, err := i.refresh(t.Context()); err != nil || c.AccessKeyID != "first" {
				t.Fatalf("%s, %v", c.AccessKeyID, err)
			}
		}
		if n.Load() != 1 {
			t.Errorf("%d calls, want 1", n.Load())
		}
	})
}
