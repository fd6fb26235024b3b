package aws

import (
	"context"
	"net/http"
	"slices"
	"time"
)

// Fault makes calls fail. The delay comes first, then the first of Hang, Hangup and Code that is set; with none of them the
// call is slow and otherwise normal. A fault strikes before the request is authenticated.
type Fault struct {
	Operation string // AssumeRole, ListBuckets, …; empty: any
	RoleARN   string // of the role to be assumed; empty: any
	Times     int    // how often it strikes; 0: until it is removed

	Delay   time.Duration
	Hang    bool // never answer, until the client gives up or the fault is removed
	Hangup  bool // close the connection without an answer
	Status  int
	Code    string
	Message string

	removed chan struct{}
}

// Throttled is the answer to too many calls.
func Throttled() Fault {
	return Fault{Status: http.StatusBadRequest, Code: "Throttling", Message: "Rate exceeded"}
}

// Unavailable is the answer of a service that is down behind its load balancer.
func Unavailable() Fault {
	return Fault{Status: http.StatusServiceUnavailable, Code: "ServiceUnavailable", Message: "Service Unavailable"}
}

// Inject makes a fault strike calls from now on; earlier ones go before later ones. The function that it returns removes the
// fault and releases calls that hang.
func (s *Server) Inject(f Fault) (remove func()) {
	f.removed = make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &f)
	removed := false
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !removed {
			removed = true
			close(f.removed)
		}
		s.faults = slices.DeleteFunc(s.faults, func(other *Fault) bool { return other == &f })
	}
}

// hangup is an answer that is none.
type hangup struct{}

// fault returns the fault that strikes a call.
func (s *Server) fault(operation, role string) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range s.faults {
		if f.Operation != "" && f.Operation != operation || f.RoleARN != "" && f.RoleARN != role {
			continue
		}
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				s.faults = slices.Delete(s.faults, i, i+1)
			}
		}
		return f
	}
	return nil
}

// apply waits as the fault wants and returns the answer; nil: go on.
func (f *Fault) apply(ctx context.Context) any {
	if f.Delay > 0 {
		t := time.NewTimer(f.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return hangup{}
		case <-f.removed:
		}
	}
	switch {
	case f.Hang:
		select {
		case <-ctx.Done():
		case <-f.removed:
		}
		return hangup{}
	case f.Hangup:
		return hangup{}
	case f.Code != "":
		return refusal{f.Status, f.Code, f.Message}
	}
	return nil
}
