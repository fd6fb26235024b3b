package proxy

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/cache"
)

// Pod names a pod of this node.
type Pod struct{ UID, Namespace, Name, ServiceAccount string }

// Caller is the pod that holds a source IP and what Policy.Authorize decided about it. The decision is made when one of
// the objects changes, so that a request only reads it. A Caller is immutable.
type Caller struct {
	Pod Pod
	// Since is when the pod began to hold the IP, by the node's clock and never too late: session tokens issued before it
	// belong to an earlier holder. Zero when unknown: then the check is skipped.
	Since time.Time
	// Grant is what the pod may have. Nil when Refusal is not.
	Grant   *Grant
	Refusal *Refusal
}

// Grant is the role that one pod may have.
type Grant struct {
	Key  cache.Key
	Role string // last segment of the role's ARN: what the role list shows
	Path string // path and name, as kube2iam's clients may ask for it: team/my-role

	// handedOut is the time of issue, in Unix nanoseconds, of the session that the pod was given last: each is logged once.
	handedOut atomic.Int64
	ref       cache.Ref // to what there is for Key
}

// RefusalKind says what stands between a known pod and credentials.
type RefusalKind int

// The kinds of refusal.
const (
	NoRole  RefusalKind = iota // nothing names a role: 404
	Denied                     // the namespace's policy does not permit the role: 403
	Invalid                    // an annotation cannot be used: 403
)

// Refusal says why a known pod gets no credentials, and what to do. What it says is the same everywhere: in the answer to the
// pod, in an Event, on the status page and in -check.
type Refusal struct {
	Kind             RefusalKind
	Event            string // reason of the Event; empty: none
	OnServiceAccount bool   // the Event belongs to the ServiceAccount
	Text             string // one line, holds a space, no control characters
	Fix              string // what to do, a command to paste where there is one; empty: nothing, or Text says it
	Misplaced        bool   // of NoRole: the pod itself is annotated, where that has no effect
}

// Error is Text with Fix, together at most 1 KiB.
func (r *Refusal) Error() string { return withFix(r.Text, r.Fix) }

// withFix is how a text and what to do about it are shown on one line.
func withFix(text, fix string) string {
	if fix == "" {
		return text
	}
	return text + "; fix: " + fix
}

// Reasons of Events: names of the contract.
const (
	EventRoleDenied        = "RoleDenied"
	EventCredentialsFailed = "CredentialsFailed"
	EventRoleConflict      = "RoleConflict"
	EventInvalidRoleARN    = "InvalidRoleARN"
)

// Reasons of further Events.
const (
	EventInvalidAnnotation = "InvalidAnnotation" // any other annotation cannot be used
	EventNoRole            = "NoRole"            // the pod has asked and nothing names a role; no warning, most mean it so
	EventAmbiguousIP       = "AmbiguousIP"       // another running pod has the same IP
)

// What a CallerFinder answers when no single pod holds an IP. All of them are 503: a default would be a guess.
var (
	ErrNotSynced   = errors.New("the pods of this node are not known yet")
	ErrUnknownIP   = errors.New("no pod of this node is known to have this IP")
	ErrAmbiguousIP = errors.New("more than one running pod has this IP")
	ErrIncomplete  = errors.New("the pod's service account or namespace is not known yet")
)

// CallerFinder tells who holds an IP. It is safe for concurrent use.
type CallerFinder interface {
	// Find never blocks and does not allocate. Its error wraps one of the four above.
	Find(ip netip.Addr) (*Caller, error)
	// Wait is Find that waits, for events and not by polling, until there is a caller or ctx is done; then it returns
	// Find's last error.
	Wait(ctx context.Context, ip netip.Addr) (*Caller, error)
}

// CredentialSource has the credentials of a key: *cache.Cache.
type CredentialSource interface {
	// Peek never blocks: nil unless there is a value that may be served now. A ref is only ever used with one key.
	Peek(key *cache.Key, ref *cache.Ref, now time.Time) *cache.Credentials
	// Get waits for a value until ctx is done. Its error is an *cache.IssueError or wraps cache.ErrUnavailable.
	Get(ctx context.Context, key cache.Key) (*cache.Credentials, error)
}

// Reporter puts an Event where the pod's owner will look. It never blocks.
type Reporter interface {
	Report(pod Pod, onServiceAccount bool, reason, text string)
}
