package aws

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/xml"
	"net/http"
)

type metaXML struct {
	RequestID string `xml:"RequestId"`
}

func (r *request) meta() metaXML { return metaXML{r.call.RequestID} }

type credentialsXML struct {
	AccessKeyID     string `xml:"AccessKeyId"`
	SecretAccessKey string
	SessionToken    string
	Expiration      string
}

type assumedRoleUserXML struct {
	ID  string `xml:"AssumedRoleId"`
	ARN string `xml:"Arn"`
}

type assumeRoleResponse struct {
	XMLName xml.Name         `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleResponse"`
	Result  assumeRoleResult `xml:"AssumeRoleResult"`
	Meta    metaXML          `xml:"ResponseMetadata"`
}

type assumeRoleResult struct {
	Credentials      credentialsXML
	User             assumedRoleUserXML `xml:"AssumedRoleUser"`
	PackedPolicySize int
}

type webIdentityResponse struct {
	XMLName xml.Name          `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleWithWebIdentityResponse"`
	Result  webIdentityResult `xml:"AssumeRoleWithWebIdentityResult"`
	Meta    metaXML           `xml:"ResponseMetadata"`
}

type webIdentityResult struct {
	Credentials credentialsXML
	User        assumedRoleUserXML `xml:"AssumedRoleUser"`
	Subject     string             `xml:"SubjectFromWebIdentityToken"`
	Provider    string
	Audience    string
}

type callerIdentityResponse struct {
	XMLName xml.Name             `xml:"https://sts.amazonaws.com/doc/2011-06-15/ GetCallerIdentityResponse"`
	Result  callerIdentityResult `xml:"GetCallerIdentityResult"`
	Meta    metaXML              `xml:"ResponseMetadata"`
}

type callerIdentityResult struct {
	ARN     string `xml:"Arn"`
	UserID  string `xml:"UserId"`
	Account string
}

type listBucketsResult struct {
	XMLName xml.Name    `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListAllMyBucketsResult"`
	Owner   ownerXML    `xml:"Owner"`
	Buckets []bucketXML `xml:"Buckets>Bucket"`
}

type ownerXML struct{ ID string }

type bucketXML struct{ Name, CreationDate string }

type listGroupsResponse struct {
	XMLName     xml.Name   `xml:"https://iam.amazonaws.com/doc/2010-05-08/ ListGroupsResponse"`
	Groups      []groupXML `xml:"ListGroupsResult>Groups>member"`
	IsTruncated bool       `xml:"ListGroupsResult>IsTruncated"`
	Meta        metaXML    `xml:"ResponseMetadata"`
}

type groupXML struct {
	Path       string
	Name       string `xml:"GroupName"`
	ID         string `xml:"GroupId"`
	ARN        string `xml:"Arn"`
	CreateDate string
}

type errorXML struct {
	Type, Code, Message string
}

type stsError struct {
	XMLName   xml.Name `xml:"https://sts.amazonaws.com/doc/2011-06-15/ ErrorResponse"`
	Error     errorXML
	RequestID string `xml:"RequestId"`
}

type iamError struct {
	XMLName   xml.Name `xml:"https://iam.amazonaws.com/doc/2010-05-08/ ErrorResponse"`
	Error     errorXML
	RequestID string `xml:"RequestId"`
}

type s3Error struct {
	XMLName   xml.Name `xml:"Error"`
	Code      string
	Message   string
	RequestID string `xml:"RequestId"`
	HostID    string `xml:"HostId"`
}

// roleID is the unique id that IAM would give to a role of this ARN.
func roleID(arn string) string {
	sum := sha256.Sum256([]byte(arn))
	return "AROA" + base32.StdEncoding.EncodeToString(sum[:])[:17]
}

func writeRefusal(w http.ResponseWriter, r *request, f refusal) {
	e := errorXML{"Sender", f.code, f.message}
	if f.status >= 500 {
		e.Type = "Receiver"
	}
	switch r.service {
	case "s3":
		write(w, r, f.status, s3Error{Code: f.code, Message: f.message, RequestID: r.call.RequestID, HostID: "stand-in"})
	case "iam":
		write(w, r, f.status, iamError{Error: e, RequestID: r.call.RequestID})
	default:
		write(w, r, f.status, stsError{Error: e, RequestID: r.call.RequestID})
	}
}

func write(w http.ResponseWriter, r *request, status int, document any) {
	body, err := xml.Marshal(document)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	if r.service == "s3" {
		h.Set("Content-Type", "application/xml")
		h.Set("X-Amz-Request-Id", r.call.RequestID)
	} else {
		h.Set("Content-Type", "text/xml")
		h.Set("X-Amzn-Requestid", r.call.RequestID)
	}
	w.WriteHeader(status)
	_, _ = w.Write(append([]byte(xml.Header), body...)) // the client may be gone
}
