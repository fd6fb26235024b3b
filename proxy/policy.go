package proxy

import "time"

// Issuers, the values of -issuer.
const (
	IssuerAssumeRole  = "assume-role"
	IssuerWebIdentity = "web-identity"
)

// Annotations that imdsgate reads: names of the contract, of EKS, kube2iam and kiam.
const (
	AnnotationRoleARN         = "eks.amazonaws.com/role-arn"               // ServiceAccount
	AnnotationAudience        = "eks.amazonaws.com/audience"               // ServiceAccount
	AnnotationTokenExpiration = "eks.amazonaws.com/token-expiration"       // ServiceAccount
	AnnotationSTSRegional     = "eks.amazonaws.com/sts-regional-endpoints" // ServiceAccount, no effect
	AnnotationSessionDuration = "imdsgate.dev/session-duration"            // ServiceAccount
	AnnotationExternalID      = "imdsgate.dev/external-id"                 // ServiceAccount
	AnnotationPodRole         = "iam.amazonaws.com/role"                   // Pod
	AnnotationPodExternalID   = "iam.amazonaws.com/external-id"            // Pod
	AnnotationPodSessionName  = "iam.amazonaws.com/session-name"           // Pod
	AnnotationAllowedRoles    = "iam.amazonaws.com/allowed-roles"          // Namespace, JSON list of globs
	AnnotationPermitted       = "iam.amazonaws.com/permitted"              // Namespace, regular expression
)

// Policy decides which role a pod may have: pure, total on any input, safe for concurrent use. Prefetch and requests use the
// same decision.
type Policy struct {
	Issuer          string // IssuerAssumeRole or IssuerWebIdentity
	BaseRoleARN     string // completes short role names; empty: they are refused
	DefaultRole     string // of a known pod with no role at all; exempt from the namespace policy
	NamespacePolicy string // off, glob, regexp, auto
	PodAnnotations  bool   // also read kube2iam's and kiam's annotations on pods
	SessionDuration time.Duration
	SessionTags     bool
	ClusterName     string
	Node            string   // in the session name, up to its first dot
	Audiences       []string // that a service account may name; the first is the default
	Chained         bool     // an intermediate role is assumed first: sessions are at most 1 h
}

// Subject is what the decision about a pod rests on. Annotation maps may be nil.
type Subject struct {
	Pod                       Pod
	PodAnnotations            map[string]string
	ServiceAccountAnnotations map[string]string
	ServiceAccountAbsent      bool // confirmed absent
	Namespace                 *NamespaceRules
}

// NamespaceRules are a namespace's role patterns, compiled once when the object changes.
type NamespaceRules struct {
	// filled in by Policy.Compile
}

// Compile reads a namespace's annotations. What cannot be compiled becomes rules that permit nothing and say why.
func (p *Policy) Compile(annotations map[string]string) *NamespaceRules { panic("to be written") }

// Authorize decides. Exactly one of Grant and Refusal is not nil. Conflict is not empty when the pod's own annotation
// differs from the service account's, which wins.
func (p *Policy) Authorize(s Subject) (grant *Grant, refusal *Refusal, conflict string) {
	panic("to be written")
}
